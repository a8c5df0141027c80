"""How it is computed: linear layers and attention; one file per idea."""
