"""piste."""
