"""Limits on files of strangers: where they lead (paths), what they hold (json_file, yaml_loader), what is shown of them."""
