"""What methods find before they run: sharing strategies from real inputs, matches of weights."""
