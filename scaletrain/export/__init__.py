"""Weights in the ecosystem's own layout, proved equal to what was trained before they are called exported."""
