"""Text generation with a GPT, in any parallel layout."""
