"""What a person sees: tables, pictures, reports, the dashboard."""
