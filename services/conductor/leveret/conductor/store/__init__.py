"""SQL, by aggregate. Plain statements with names; every transaction is opened by the caller."""
