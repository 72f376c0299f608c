"""What coordinator and worker share and users never see: the nouns of the link, and their wire form."""
