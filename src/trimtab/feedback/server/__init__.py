"""The web app: pages for annotators, adjudicators and admins, and a REST interface."""
