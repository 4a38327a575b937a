"""Small parts that all other folders use. Imports nothing else of Coldstill."""
