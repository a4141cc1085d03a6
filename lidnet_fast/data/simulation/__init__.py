"""Low-dose CT from normal dose: projection, and noise in images or in projections."""
