"""Recorded chains of thought, read again by a real engine: what does sharing do to the model?"""
