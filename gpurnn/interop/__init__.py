"""Models of other libraries, and gpurnn's models in them: each module imports its library when it is used."""
