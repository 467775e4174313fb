"""Our weights inside other people's libraries, one file a library."""
