"""The only writer of Postgres: takes requests, places VMs, applies what hosts report, sweeps, relays events."""
