"""Ray: scoring, training, tuning and teachers on a cluster. The only folder that imports ray."""
