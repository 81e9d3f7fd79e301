"""The nouns that everything uses: paths, element types, boxes, leaves and how messages name ranks."""
