"""piste in other people's training loops, the real ones, on tiny random models."""
