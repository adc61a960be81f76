"""Every network that looks at images: loading, preprocessing, features."""
