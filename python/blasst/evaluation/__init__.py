"""What a model loses and gains at several target sparsities, next to dense."""
