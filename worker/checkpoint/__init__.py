"""The shard checkpoint: what each rank holds of a model, packed in a store of its node, to start again from."""
