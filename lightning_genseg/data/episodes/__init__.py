"""Episodes of few-shot segmentation."""
