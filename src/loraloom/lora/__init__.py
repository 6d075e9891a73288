"""The method: layers, slots, routes, adapters, their files. Imports torch and safetensors alone."""
