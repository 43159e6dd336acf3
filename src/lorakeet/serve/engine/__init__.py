"""Engine of a server: requests in, pieces of answers out; rows of many adapters run together on one base."""
