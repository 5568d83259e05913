"""The fast implementations as seen from Python. `fastlm.ops` decides when each is used."""
