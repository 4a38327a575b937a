"""The ground floor: small parts that every room uses. Imports nothing else of Coldstill."""
