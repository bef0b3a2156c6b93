"""A page to draw with, a monitor of trainings, and an API as OpenAI clients call it."""
