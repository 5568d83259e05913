"""fastlm: language models that run fast on the machine you have."""
