"""Problems in rows: found, counted, reported, fixed."""
