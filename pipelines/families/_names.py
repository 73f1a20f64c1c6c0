"""What the files of a model's folder are called."""

INDEX_FILE = "model_index.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
"""The adapter as PEFT keeps it, beside ``LORA_FILE``, for pipelines without a LoRA loader."""
NOTE_FILE = "diffalign.json"
METADATA = "lora_adapter_metadata"
"""Where Diffusers keeps PEFT's configuration in the header of a LoRA's file."""
