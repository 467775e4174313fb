"""All pictures: matches, features on images and points, predictions, previews of data."""
