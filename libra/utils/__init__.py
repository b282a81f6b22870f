"""What every room uses: command lines, files, sentences of errors, provenance, clocks. Nothing here knows a
model or a method."""
