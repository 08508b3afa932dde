"""``effref report``: results as one HTML page that needs nothing but itself.

`reading` checks files, `grouping` puts together what belongs together, `drawing` and `scales` make SVG, one module per
kind of chart says what is drawn, and `page` lays it out.
"""
