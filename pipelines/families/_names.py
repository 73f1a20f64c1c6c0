"""What the files of a model's folder are called."""

INDEX_FILE = "model_index.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
NOTE_FILE = "diffalign.json"
