"""Tables and pages that show a ViT, stage by stage."""
