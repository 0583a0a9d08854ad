"""The API: thin REST. It publishes requests, reads Postgres with a read-only role, and follows events."""
