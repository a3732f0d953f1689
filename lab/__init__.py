"""What every pillar stands on; knows no pillar."""
