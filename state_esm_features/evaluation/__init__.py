"""Whether own vectors help State on a screen: runs, figures, and what they allow to say."""
