"""One worker per host: drives the hypervisor towards the last desired state it heard, and reports what it sees."""
