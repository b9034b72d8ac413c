"""The embedded example: a micro-language of short reviews, its gold scorer, data and report; nothing is downloaded."""
