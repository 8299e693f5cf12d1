"""The demonstration job: a short SFT and then a DPO run on a real small model, watched from outside."""
