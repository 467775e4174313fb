"""Pictures of what a backbone has learned: matches between views, features on images and on points."""
