"""Pictures of text, drawn from a recipe: pure, compositional and complex pages, in English and Chinese."""
