"""Answers of a model: sampled in batches, and streamed to a person who chats with it."""
