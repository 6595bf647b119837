"""What every paper's trainer shares: settings, data, networks, augmentation, the run's folder and its report."""
