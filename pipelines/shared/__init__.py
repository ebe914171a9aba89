"""What several commands use: preparing data, places, tables, output."""
