"""Speed, as ratios within one run: what is compared takes turns on the same machine, the same requests each."""
