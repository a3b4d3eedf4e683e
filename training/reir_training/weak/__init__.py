"""Training of the weakly supervised model: photos and sentences, without boxes."""
