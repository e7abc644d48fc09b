"""How a player is wrapped, accumulated, scaled, clipped and stepped: one file per way."""
