"""What every Leveret service agrees on: documents, messages, topology, life cycle, errors and the bus."""
