"""Models, one file each, and the two seams that everything else plugs into."""
