"""The video model: tensors only. It knows nothing of prompts' owners, databases, stores or schedules.

This file imports nothing, so that `model.config` and `model.loading.card` can be read without loading torch.
"""
