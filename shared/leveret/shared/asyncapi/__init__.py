"""The published contract of the bus: docs/asyncapi.yaml and the tables of docs/amqp.md, generated and tested."""
