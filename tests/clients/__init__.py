"""The real packages of real clients, from the extra `clients`: `make test-clients`."""
