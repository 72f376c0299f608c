"""What is computed: configs, parameter tables, layers and families."""
